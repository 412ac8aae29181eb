"""Files and connections: written completely or not at all, locked, fetched from the hub without pickles."""
