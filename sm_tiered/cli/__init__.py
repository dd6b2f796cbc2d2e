"""The command line, ``sm-tiered``: one small file a command. It only reads: no writes, no locks, no pickle."""
