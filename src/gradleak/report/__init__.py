"""What a run leaves behind: a JSON record (`record`), a page drawn from it (`html`), a picture (`sheet`). No torch."""
