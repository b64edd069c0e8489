"""`spark-submit jobs/features.py --settings FILE`: the stage `features`, see pipeline/features.py."""

from jobs.stage import main

if __name__ == "__main__":
    main("features")
