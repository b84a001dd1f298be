-- What others may query: the live generation as stable views, with timestamps for people.
CREATE OR REPLACE VIEW public.users AS
SELECT id FROM {generation}.users;

CREATE OR REPLACE VIEW public.upload_batches AS
SELECT
    id,
    user_id,
    name,
    status,
    sealed,
    expected_uploads,
    queued + processing + completed + failed + cancelled AS total_uploads,
    completed + failed AS processed_uploads,
    completed AS successful_uploads,
    failed AS failed_uploads,
    cancelled AS cancelled_uploads,
    size_bytes,
    metadata,
    error_message,
    timestamptz 'epoch' + created_ms * interval '1 millisecond' AS created_at,
    timestamptz 'epoch' + updated_ms * interval '1 millisecond' AS updated_at,
    timestamptz 'epoch' + started_ms * interval '1 millisecond' AS started_at,
    timestamptz 'epoch' + completed_ms * interval '1 millisecond' AS completed_at,
    partition,
    last_offset
FROM {generation}.upload_batches;

CREATE OR REPLACE VIEW public.uploads AS
SELECT
    id,
    batch_id,
    filename,
    content_type,
    size_bytes,
    sha256,
    status,
    attempts,
    error_code,
    error_message,
    result,
    timestamptz 'epoch' + created_ms * interval '1 millisecond' AS created_at,
    timestamptz 'epoch' + updated_ms * interval '1 millisecond' AS updated_at,
    timestamptz 'epoch' + started_ms * interval '1 millisecond' AS started_at,
    timestamptz 'epoch' + completed_ms * interval '1 millisecond' AS completed_at,
    last_offset
FROM {generation}.uploads;

CREATE OR REPLACE VIEW public.batch_events AS
SELECT
    batch_id,
    partition,
    record_offset AS "offset",
    timestamptz 'epoch' + time_ms * interval '1 millisecond' AS time,
    ignored
FROM {generation}.batch_events;

CREATE OR REPLACE VIEW public.positions AS
SELECT
    partition,
    log_id,
    next_offset,
    epoch,
    timestamptz 'epoch' + time_ms * interval '1 millisecond' AS time
FROM {generation}.positions;
