"""`spark-submit jobs/walks.py --settings FILE`: the stage `walks`, see pipeline/walks.py."""

from jobs.stage import main

if __name__ == "__main__":
    main("walks")
