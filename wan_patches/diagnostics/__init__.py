"""What people ask about a run: is it the same, how fast, how much memory, what is wrong here."""
