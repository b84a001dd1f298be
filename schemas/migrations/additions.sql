-- Columns that read models made by an older Sluice lack; each stands in generation.sql too, last in its table, and has a
-- default, so that services of both versions work on both. Rows of before keep the default until a replay fills it.
ALTER TABLE {generation}.upload_batches ADD COLUMN retries json NOT NULL DEFAULT '{}';
