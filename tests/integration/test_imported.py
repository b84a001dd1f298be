"""Services on an imported log: the positions that clients kept from the log before it go on being good."""

from pathlib import Path

from schemas.position import Position
from services.archive.exporting import Exporter
from services.archive.importing import Importer
from services.archive.places import Folder
from services.archive.selecting import Whole
from services.eventlog import EventLog, LogSettings
from services.notifier.main import notifying
from services.settings import Settings
from tests.examples import a_finished_batch
from tests.integration.api_client import api_settings, code_of, running_api
from tests.notifiers import a_quiet_scene, settings_for, types_of


async def moved(settings: Settings, folder: Path) -> Settings:
    """The log exported and imported into another topic; settings of services there. They have no read models yet."""

    def log_settings(topic: str) -> LogSettings:
        return LogSettings(bootstrap_servers=settings.kafka_bootstrap_servers, topic=topic)

    elsewhere = f"{settings.log_topic}.again"
    async with EventLog.open(log_settings(settings.log_topic)) as log:
        await Exporter(log, Folder(folder), Whole(), lambda _news: None).run()
    async with EventLog.open(log_settings(elsewhere)) as log:
        await Importer(log, Folder(folder), lambda _news: None).run()
    return settings.model_copy(update={"log_topic": elsewhere})


async def test_a_client_goes_on_at_the_imported_log_where_it_left_the_one_before(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = settings_for(kafka=kafka, database_url=database_url, unique=unique)
    async with a_quiet_scene(settings) as scene:
        story = a_finished_batch()
        left = await scene.append(*story[:3])
        last = await scene.append(*story[3:])
    async with notifying(await moved(settings, tmp_path)) as notifier:
        scene.port = notifier.port
        here = notifier.tail.log_id
        async with scene.connected() as watcher:
            answer = await watcher.subscribe(since=str(left))
            heard = await watcher.hear_to(Position.of(here, dict(last.offsets)))
        async with scene.connected() as watcher:
            of_user = await watcher.subscribe_user(since=str(left))
        async with scene.connected() as watcher:
            beyond = await watcher.subscribe(since=str(last.at(0, last.offsets[0][1] + 1)))

    assert here != scene.log_id
    assert (answer["recovered"], answer["position"]) == (True, str(Position.of(here, dict(left.offsets))))
    assert types_of(heard) == [event.type.split(".")[1] for event in story[3:]]
    assert of_user["recovered"] is True
    assert (beyond["recovered"], beyond["batch"]["status"]) == (False, "completed")


async def test_the_api_takes_positions_of_the_log_before(
    kafka: str, database_url: str, unique: str, tmp_path: Path
) -> None:
    settings = api_settings(
        kafka=kafka,
        database_url=database_url,
        unique=unique,
        blobs=tmp_path / "blobs",
        projection_timeout_s=0.2,
    )
    async with running_api(settings) as api:
        ada = await api.person("ada")
        created = await ada.post("/v1/batches", json={"name": "n"})
        batch, opened = created.json()["id"], Position.parse(created.headers["Sluice-Position"])
        sealed = Position.parse((await ada.post(f"/v1/batches/{batch}/seal")).headers["Sluice-Position"])
    async with running_api(await moved(settings, tmp_path / "export")) as api:
        ada = await api.person("ada")
        then = await ada.get(f"/v1/batches/{batch}", at=str(opened))
        now = await ada.get(f"/v1/batches/{batch}", at=str(sealed))
        behind = await ada.get(f"/v1/batches/{batch}", min_position=str(sealed))
        beyond = str(sealed.at(0, sealed.offsets[0][1] + 1))
        refused = [await ada.get(f"/v1/batches/{batch}", **{name: beyond}) for name in ("at", "min_position")]

    here = then.json()["position"].split(".")[0]
    assert here != opened.log
    assert (then.json()["sealed"], then.json()["position"]) == (False, str(opened).replace(opened.log, here))
    assert (now.json()["sealed"], now.json()["position"]) == (True, str(sealed).replace(sealed.log, here))
    assert (behind.status_code, code_of(behind)) == (503, "projection_behind"), "of this log, and nobody projects it"
    assert [code_of(answer) for answer in refused] == ["position_of_another_log"] * 2
