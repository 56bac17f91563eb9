"""Models, composed from strategies and mathematics; a family's file says only how it differs."""
