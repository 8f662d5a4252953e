"""A study that several processes work on, on one machine or many: who does what, and what must be alike."""
