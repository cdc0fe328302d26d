"""What one generation asks for, and what it runs on."""
