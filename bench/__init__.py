"""The bench: operators against their peers and against the machine's measured limits. Not installed with the package.

    python -m bench decode          # time the decode operator; writes bench/results/*.json
    python -m bench limits          # measure and print the machine's limits
    python -m bench table           # write the tables of the README from bench/results/

`timing` measures, `limits` says what the machine can do, `peers` holds what we compare with, `runner` puts them
together and checks every timed result, `report` turns results into tables. A suite (`decode`) makes problems to time.
"""
