"""The parts of the report: figures and examples of runs, charts, sections of the page."""
