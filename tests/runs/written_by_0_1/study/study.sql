BEGIN TRANSACTION;
CREATE TABLE results (
    key TEXT PRIMARY KEY, digest TEXT NOT NULL, result TEXT NOT NULL, seconds REAL NOT NULL, deaths INTEGER NOT NULL,
    finished TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);
INSERT INTO "results" VALUES('dr_grpo/seed0','d0908ed5aa8c8ddbd1b2cf41b75e6184','{"status": "finished", "attempts": 1, "seconds": 0.86, "accuracy_after": 1.0}',6.46787744599987490801e+00,0,'2026-11-25T21:27:48.806Z');
INSERT INTO "results" VALUES('grpo/seed0','24809bb1a30961eb86cb6b4902859f1d','{"status": "finished", "attempts": 1, "seconds": 0.88, "accuracy_after": 1.0}',1.30392746600000464241e+00,0,'2026-11-25T21:27:50.114Z');
INSERT INTO "results" VALUES('dr_grpo/seed1','f0986c58c4358858cf4406672243ff4c','{"status": "finished", "attempts": 1, "seconds": 0.78, "accuracy_after": 1.0}',1.18957667299991953768e+00,0,'2026-11-25T21:27:51.307Z');
INSERT INTO "results" VALUES('grpo/seed1','5705dd98d75dec77503cb57ca7710f30','{"status": "finished", "attempts": 1, "seconds": 0.91, "accuracy_after": 1.0}',1.31206579700005931954e+00,0,'2026-11-25T21:27:52.622Z');
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "settings" VALUES('command','"mirrorpo study small_study.yaml --out study --workers 1 --threads 1"');
INSERT INTO "settings" VALUES('versions','{"mirrorpo": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "trl": "1.16.0", "accelerate": "1.15.0", "python": "3.11.7"}');
COMMIT;
