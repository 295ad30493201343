"""A patch for Allegro, installed beside wan-patches and found by it."""
