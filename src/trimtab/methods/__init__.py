"""The methods, one file each, in the survey's three families. The registry imports every file below this folder."""
