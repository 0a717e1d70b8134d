"""What a run came to: its final figures as JSON with stable keys, and one self-contained page that shows them."""
