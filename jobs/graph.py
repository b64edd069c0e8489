"""`spark-submit jobs/graph.py --settings FILE`: the stage `graph`, see pipeline/graph.py."""

from jobs.stage import main

if __name__ == "__main__":
    main("graph")
