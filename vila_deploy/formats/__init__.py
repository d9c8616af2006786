"""How a 4-bit linear lies in each on-disk format: packing, and back, bit for bit."""
