"""What every other room needs: errors, files, text, intervals, processes. Imports nothing else of the package."""
