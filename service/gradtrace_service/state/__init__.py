"""What people keep in the service, in an SQLite file: marks of training rows, and saved questions. Without HTTP."""
