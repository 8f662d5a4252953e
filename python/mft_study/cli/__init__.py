"""The verbs on studies, and what two other verbs of mft do on a study; mft finds both by entry points."""
