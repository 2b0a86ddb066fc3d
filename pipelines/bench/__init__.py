"""What the hardware gives, measured: `mae bench step`, and what else is told apart by a clock."""
