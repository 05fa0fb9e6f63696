BEGIN TRANSACTION;
CREATE TABLE results (
    key TEXT PRIMARY KEY, digest TEXT NOT NULL, result TEXT NOT NULL, seconds REAL NOT NULL, deaths INTEGER NOT NULL,
    finished TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);
INSERT INTO "results" VALUES('g000/p0+','94c0b852c20e2e40f4846da5447f4496','{"fitness": 0.890625, "failed": null, "right": 57, "problems": 64, "samples": 1, "mean_length": 16.5}',1.02924182360000031626e+01,0,'2026-11-25T21:28:26.013Z');
INSERT INTO "results" VALUES('g000/p0-','28a998f91b5a61ffd4b0713cf7544366','{"fitness": 0.90625, "failed": null, "right": 58, "problems": 64, "samples": 1, "mean_length": 16.5}',1.09495546699986334715e+00,0,'2026-11-25T21:28:27.132Z');
INSERT INTO "results" VALUES('g001/p0+','5501537cb135f81fbd5e356ce73a3147','{"fitness": 0.875, "failed": null, "right": 56, "problems": 64, "samples": 1, "mean_length": 16.734375}',9.15540640000017447164e-01,0,'2026-11-25T21:28:28.090Z');
INSERT INTO "results" VALUES('g001/p0-','933dd1dfca7114e4695b7887e1ccb46e','{"fitness": 0.84375, "failed": null, "right": 54, "problems": 64, "samples": 1, "mean_length": 16.703125}',8.09724890999859781004e-01,0,'2026-11-25T21:28:28.922Z');
INSERT INTO "results" VALUES('g001/elite0','7ffef6120261c33faac9c2459f9e9d37','{"fitness": 0.875, "failed": null, "right": 56, "problems": 64, "samples": 1, "mean_length": 16.734375}',8.09379514000056587974e-01,0,'2026-11-25T21:28:29.750Z');
INSERT INTO "results" VALUES('g001/elite1','04aa8f12e04199fbe93076b52f5addfe','{"fitness": 0.875, "failed": null, "right": 56, "problems": 64, "samples": 1, "mean_length": 16.734375}',7.97771427000043331645e-01,0,'2026-11-25T21:28:30.570Z');
INSERT INTO "results" VALUES('final/best0','5103e925f397f41771eed2ec659955c4','{"fitness": 0.5, "failed": null, "right": 2, "problems": 4, "samples": 1, "mean_length": 16.5}',7.7982924299999467621e-01,0,'2026-11-25T21:28:31.397Z');
INSERT INTO "results" VALUES('final/start0','3b62a3ffb18451d30f4d8f37c140963a','{"fitness": 0.5, "failed": null, "right": 2, "problems": 4, "samples": 1, "mean_length": 16.5}',7.23227457000120921293e-01,0,'2026-11-25T21:28:32.147Z');
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "settings" VALUES('threads','1');
COMMIT;
