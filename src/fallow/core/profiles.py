"""What each profile allows: the limits an owner starts from, before their own settings change single ones."""

from msgspec.structs import replace

from fallow.model.owner import Limits, Profile, Window

SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
GB = 10**9
NIGHT = Window(22 * 60, 7 * 60)


def limits(profile: Profile, *, cores_physical: int) -> Limits:
    """The limits of a profile on a machine with so many physical cores."""
    invisible = _invisible(cores_physical)
    match profile:
        case "invisible":
            return invisible
        case "balanced":
            return replace(
                invisible,
                profile=profile,
                others_share_max=0.6,  # SCHED_IDLE keeps the owner's work at 90 %, which is what this owner agreed to
                resume_after_ms=MINUTE_MS,
                input_idle_s_min=None,  # works beside an owner who types; a game or a film (full screen) still stops it
            )
        case "dedicated":
            return replace(
                invisible,
                profile=profile,
                cores_max=max(1, cores_physical),
                others_share_max=None,  # nobody to yield to: it only takes fewer threads while others are busy
                resume_after_ms=0,
                input_idle_s_min=None,
                while_fullscreen=True,
                on_battery=True,  # whoever starts `fallow up` on a laptop's battery wants it to work there
                battery_percent_min=0.0,
                temperature_c_max=95.0,  # just under where processors slow themselves down
                memory_free_share_min=0.05,  # enough to stay clear of the kernel's out-of-memory killer
                memory_pressure_max=40.0,  # real thrashing only
                io_pressure_max=None,
                leave_after_ms=None,  # nobody else wants the memory
            )
        case "night":
            return replace(invisible, profile=profile, hours=(NIGHT,))
        case "quiet":
            return replace(
                invisible,
                profile=profile,
                cores_max=max(1, cores_physical // 2),
                temperature_c_max=65.0,  # below where most fans get loud
            )


def _invisible(cores_physical: int) -> Limits:
    return Limits(
        profile="invisible",
        cores_max=max(1, cores_physical - 1),  # one core is always the owner's
        others_share_max=0.25,  # where a burst is told from the background of a desktop
        resume_after_ms=3 * MINUTE_MS,  # longer than most breaks in somebody's work
        input_idle_s_min=180.0,
        while_fullscreen=False,
        while_metered=False,
        on_battery=False,
        battery_percent_min=50.0,  # let it charge first; many laptops are set to charge to 60 or 80 % only
        temperature_c_max=85.0,  # warm, but some degrees before anything slows down
        memory_free_share_min=0.15,  # below it the owner's next program would push others out
        memory_pressure_max=10.0,  # a tenth of the time somebody waits for memory
        io_pressure_max=25.0,  # a quarter of the time somebody waits for the disk
        disk_free_bytes_min=2 * GB,
        upload_bytes_per_day_max=None,
        leave_after_ms=30 * MINUTE_MS,
    )
