"""A patch for LTX-Video, installed beside wan-patches and found by it."""
