"""Drop-ins for training loops people already have. Import the one that fits; none of them loads another."""
