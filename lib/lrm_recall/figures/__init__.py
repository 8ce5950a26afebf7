"""One function per figure or table of the papers, drawn from rows of results alone.

Nothing here trains, reads a parameter file or opens the store: a function takes the table of rows that
`lrm_recall.results` makes and returns a matplotlib Figure with alt text, or a DataFrame.
"""
