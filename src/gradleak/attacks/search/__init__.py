"""How an attack searches."""
