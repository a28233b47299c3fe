# Asks the program itself, so that it fits the one that is installed.
. <(metcd completions bash)
