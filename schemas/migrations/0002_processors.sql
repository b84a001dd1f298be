-- compatible-from: 0001
-- How each processor is, as it says itself about once a second: for people, and for standbys, who leave a lane alone
-- for a while whose holder was heard a moment ago. A row that is missing or old costs nothing but that.
CREATE TABLE sluice_ops.processors (
    partition integer NOT NULL,
    worker_id text NOT NULL,
    machine text NOT NULL,
    pid integer NOT NULL,
    state text NOT NULL CHECK (state IN ('standing by', 'catching up', 'working')),
    since timestamptz NOT NULL,
    heartbeat timestamptz NOT NULL,
    epoch bigint,
    upload_id uuid,
    attempt integer,
    work_since timestamptz,
    degraded text[] NOT NULL,
    problems text[] NOT NULL,
    PRIMARY KEY (partition, worker_id)
);
