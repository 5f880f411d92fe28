"""What the operations share: argument checks and the precision rule."""
