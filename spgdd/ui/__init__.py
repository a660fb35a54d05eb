"""What a person sees: notebook cells and pictures. Nothing else of spgdd imports it."""
