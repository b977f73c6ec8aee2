"""The runners: parse, build, run, register. Everything they do is done by the rooms below."""
