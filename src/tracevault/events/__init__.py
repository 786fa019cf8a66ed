"""What an event is: pure functions and types that never touch a database."""
