-- One generation of the read models: everything in it is a fold of the log. `{generation}` is its schema's name.
-- Times are milliseconds since 1970 UTC and offsets are the log's, so that a replay gives the same bytes; the views in
-- schema public show them as timestamps. JSON is kept as text (json, not jsonb), so that numbers stay as they were
-- sent. Users stand before batches, whose foreign key they are.
CREATE SCHEMA {generation};

CREATE TABLE {generation}.positions (
    partition integer PRIMARY KEY,
    log_id text NOT NULL,
    next_offset bigint NOT NULL,
    epoch bigint,
    time_ms bigint NOT NULL
);

CREATE TABLE {generation}.users (
    id text PRIMARY KEY
);

CREATE TABLE {generation}.user_starts (
    partition integer NOT NULL,
    user_id text NOT NULL,
    last_started_offset bigint NOT NULL,
    PRIMARY KEY (partition, user_id)
);

CREATE TABLE {generation}.upload_batches (
    id uuid PRIMARY KEY,
    partition integer NOT NULL,
    user_id text NOT NULL REFERENCES {generation}.users (id),
    name text,
    metadata json NOT NULL,
    expected_uploads integer,
    files_max integer NOT NULL,
    batch_bytes_max bigint NOT NULL,
    file_bytes_max bigint NOT NULL,
    request_key_hash text,
    request_body_hash text,
    requests json NOT NULL,
    status text NOT NULL,
    sealed boolean NOT NULL,
    queued integer NOT NULL,
    processing integer NOT NULL,
    completed integer NOT NULL,
    failed integer NOT NULL,
    cancelled integer NOT NULL,
    size_bytes bigint NOT NULL,
    error_message text,
    created_ms bigint NOT NULL,
    created_offset bigint NOT NULL,
    updated_ms bigint NOT NULL,
    last_offset bigint NOT NULL,
    last_queued_ms bigint NOT NULL,
    started_ms bigint,
    completed_ms bigint,
    retries json NOT NULL DEFAULT '{}'
);
CREATE INDEX ON {generation}.upload_batches (user_id, created_ms DESC, created_offset DESC, partition DESC);
CREATE INDEX ON {generation}.upload_batches (partition) WHERE status IN ('pending', 'processing');

CREATE TABLE {generation}.uploads (
    id uuid PRIMARY KEY,
    batch_id uuid NOT NULL,
    filename text NOT NULL,
    content_type text NOT NULL,
    size_bytes bigint NOT NULL,
    sha256 text NOT NULL,
    blob text NOT NULL,
    key_hash text,
    body_hash text,
    status text NOT NULL,
    attempts integer NOT NULL,
    attempts_before integer NOT NULL,
    queueing integer NOT NULL,
    error_code text,
    error_message text,
    result json,
    created_ms bigint NOT NULL,
    created_offset bigint NOT NULL,
    updated_ms bigint NOT NULL,
    last_offset bigint NOT NULL,
    place bigint NOT NULL,
    started_ms bigint,
    completed_ms bigint
);
CREATE INDEX ON {generation}.uploads (batch_id, created_offset);
CREATE INDEX ON {generation}.uploads (batch_id) WHERE status IN ('queued', 'processing');

-- Batches that were deleted: what tells a repetition from a new request, and nothing else.
CREATE TABLE {generation}.deleted_batches (
    id uuid PRIMARY KEY,
    partition integer NOT NULL,
    user_id text NOT NULL,
    request_key_hash text,
    request_body_hash text,
    created_ms bigint NOT NULL,
    created_offset bigint NOT NULL,
    deleted_ms bigint NOT NULL,
    deleted_offset bigint NOT NULL
);
CREATE INDEX ON {generation}.deleted_batches (user_id, deleted_offset);

CREATE TABLE {generation}.batch_events (
    partition integer NOT NULL,
    record_offset bigint NOT NULL,
    batch_id uuid NOT NULL,
    time_ms bigint NOT NULL,
    ignored text,
    PRIMARY KEY (partition, record_offset)
);
CREATE INDEX ON {generation}.batch_events (batch_id, record_offset);
