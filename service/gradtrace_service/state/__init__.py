"""What the service keeps in an SQLite file: marks of training rows, saved questions, and jobs. Without HTTP."""
