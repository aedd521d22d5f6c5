"""What everyone agrees on: frozen values, without behaviour that could decide anything."""
