"""`spark-submit jobs/compact.py --settings FILE`: the stage `compact`, see pipeline/compact.py."""

from jobs.stage import main

if __name__ == "__main__":
    main("compact")
