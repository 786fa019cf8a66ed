"""The only room that holds a connection."""
