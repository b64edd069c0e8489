"""`spark-submit jobs/pairs.py --settings FILE`: the stage `pairs`, see pipeline/pairs.py."""

from jobs.stage import main

if __name__ == "__main__":
    main("pairs")
