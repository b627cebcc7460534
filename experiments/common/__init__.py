"""What several figures share. Nothing here is a command, and nothing imports a command."""
