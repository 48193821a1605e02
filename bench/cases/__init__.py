"""One file a case; each ends in `register(...)` and is known from then on."""
