"""`spark-submit jobs/index.py --settings FILE`: the stage `index`, see pipeline/index.py."""

from jobs.stage import main

if __name__ == "__main__":
    main("index")
