"""The HTTP server around the page: who may ask for what, how much, and what is answered."""
