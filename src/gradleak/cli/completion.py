"""What `completion` does: a script that completes commands, flags and names, for bash, zsh (by its bashcompinit) and fish. It is made of the
same tables as everything else, when it is printed: completing runs no Python."""

from typing import Literal, get_args, get_origin

from gradleak.cli import arguments, flags, sources
from gradleak.cli.app import COMMANDS, GROUPS, kind_of

BASH = """# gradleak completion bash: eval "$(gradleak completion bash)"
_gradleak() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words="" command=${{COMP_WORDS[1]}}
    case $command in {groups}) [ $COMP_CWORD -gt 1 ] && command="$command ${{COMP_WORDS[2]}}" ;; esac
    if [ $COMP_CWORD -eq 1 ]; then words="{first}"
    elif [ $COMP_CWORD -eq 2 ]; then
        case ${{COMP_WORDS[1]}} in
{second}
        esac
    fi
    case "$command $before" in
{choices}
    esac
    if [ -z "$words" ] && [[ $current == -* ]]; then
        case $command in
{flags}
        esac
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$current") )
    [ -n "$words" ] || COMPREPLY=( $(compgen -f -- "$current") )
}}
complete -o filenames -F _gradleak gradleak
"""


def completion(args: flags.Completion) -> None:
    """Print the script."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](), end="")


def known(command: str) -> dict[str, tuple[str, list[str]]]:
    """{flag: (help, the words that it takes, if they are few)} of a command; those of its attacks too."""
    found: dict[str, tuple[str, list[str]]] = {"--help": ("show this help message and exit", [])}
    for flag in arguments.flags_of(kind_of(command, COMMANDS[command][0])):
        if flag.written == arguments.OPTION.get(command):
            words = sources.attack_names()
        else:
            inner = [one for one in (flag.parts[0], *get_args(flag.parts[0])) if get_origin(one) is Literal]
            words = [str(word) for one in inner for word in get_args(one)]
        if not flag.positional:
            found[flag.written] = flag.help, words
    for name in sources.attack_names() if command in arguments.OPTION else []:
        own = {f"--{name}.{p.name.replace('_', '-')}": (p.help, list[str]()) for p in sources.attack(name).parameters}
        found |= own
    return found


def bash() -> str:
    """For bash."""
    first = " ".join(dict.fromkeys(command.split()[0] for command in COMMANDS))
    second, choices, listed = list[str](), list[str](), list[str]()
    for group in GROUPS:
        words = " ".join(command.split()[1] for command in COMMANDS if command.startswith(f"{group} "))
        second.append(f'            {group}) words="{words}" ;;')
    second.append('            list) words="attacks defenses studies models" ;;')
    second.append('            completion) words="bash zsh fish" ;;')
    for command in COMMANDS:
        told = known(command)
        listed.append(f'            "{command}") words="{" ".join(told)}" ;;')
        choices += [f'        "{command} {flag}") words="{" ".join(w)}" ;;' for flag, (_, w) in told.items() if w]
    parts = {"second": second, "choices": choices, "flags": listed}
    lines = {name: "\n".join(part) for name, part in parts.items()}
    return BASH.format(first=first, groups="|".join(GROUPS), **lines)


def zsh() -> str:
    """For zsh."""
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash()}"


def fish() -> str:
    """For fish."""
    lines = ["# gradleak completion fish > ~/.config/fish/completions/gradleak.fish"]
    begun = "__fish_use_subcommand"
    for word in dict.fromkeys(command.split()[0] for command in COMMANDS):
        lines.append(f"complete -c gradleak -n {begun} -f -a {word}")
    for command, (_, _, summary) in COMMANDS.items():
        first, _, second = command.partition(" ")
        within = f"__fish_seen_subcommand_from {first}"
        if second:
            others = " ".join(other.split()[1] for other in COMMANDS if other.startswith(f"{first} "))
            free = f"{within}; and not __fish_seen_subcommand_from {others}"
            lines.append(f"complete -c gradleak -n {quoted(free)} -f -a {second} -d {quoted(summary)}")
            within = f"{within}; and __fish_seen_subcommand_from {second}"
        for flag, (text, words) in known(command).items():
            takes = f" -x -a {quoted(' '.join(words))}" if words else ""
            said = quoted(text.split("; ")[0].split(". ")[0])
            lines.append(f"complete -c gradleak -n {quoted(within)} -l {flag.removeprefix('--')}{takes} -d {said}")
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """Text as one word of fish."""
    inner = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{inner}'"
