"""Who shares, and keeps the secret. VICTIMS is the only place where `gradleak capture` finds them: what each is called, where its
settings are, and what it does, in a line. Importing this costs nothing."""

VICTIMS: dict[str, tuple[str, str]] = {
    "gradient": ("gradleak.victims.play:CaptureGradient", "Share the gradient of one private batch."),
    "update": (
        "gradleak.victims.play:CaptureUpdate",
        "Play a client of federated averaging: share the change by local SGD.",
    ),
    "adapter": (
        "gradleak.victims.play:CaptureAdapter",
        "Fine-tune a LoRA adapter with PEFT, keep the folder that it saves.",
    ),
    "weights": (
        "gradleak.victims.publish:CaptureWeights",
        "Train a network until little changes, publish its weights.",
    ),
}
