-- What is not in the log: which generation of the read models is live, and the records that could not be decoded.
CREATE SCHEMA IF NOT EXISTS sluice_ops;

CREATE TABLE sluice_ops.live_generation (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    number integer NOT NULL CHECK (number > 0)
);
INSERT INTO sluice_ops.live_generation (number) VALUES (1);

CREATE TABLE sluice_ops.quarantine (
    log_id text NOT NULL,
    partition integer NOT NULL,
    record_offset bigint NOT NULL,
    time_ms bigint NOT NULL,
    reason text NOT NULL,
    PRIMARY KEY (log_id, partition, record_offset)
);
