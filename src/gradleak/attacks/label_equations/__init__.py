"""Labels of a small batch out of the equations of the last layer."""
