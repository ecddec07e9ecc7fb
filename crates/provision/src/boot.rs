//! How a machine starts its agent again when it comes up: by the user's crontab, or as a unit of the
//! user's systemd where there is no cron.

/// The unit's name, and what marks our line of a crontab.
const NAME: &str = "updraft-agent";

/// Script for a node's home that has `program`, called from there, run whenever the machine comes up.
#[cfg(feature = "agent")]
pub(crate) fn install(program: &str) -> String {
    format!(
        r#"
line="@reboot cd '$PWD' && UPDRAFT_GROUPS='$UPDRAFT_GROUPS' exec {program} </dev/null >/dev/null 2>&1 # {NAME}"
if command -v crontab > /dev/null; then
  crontab -l 2> /dev/null | grep -qxF "$line" ||
    {{ crontab -l 2> /dev/null | grep -v '# {NAME}$'; printf '%s\n' "$line"; }} | crontab -
elif [ -d /run/systemd/system ]; then
  units=~/.config/systemd/user
  mkdir -p "$units"
  printf '%s\n' '[Service]' "WorkingDirectory=$PWD" "Environment=UPDRAFT_GROUPS=$UPDRAFT_GROUPS" \
    "ExecStart=/bin/sh -c 'exec {program}'" '[Install]' 'WantedBy=default.target' > "$units/{NAME}.service"
  systemctl --user enable {NAME}.service > /dev/null 2>&1; loginctl enable-linger > /dev/null 2>&1
fi || true
"#
    )
}

/// Script that takes it away again.
#[cfg(any(feature = "agent", feature = "ssh"))]
pub(crate) fn remove() -> String {
    format!(
        r#"if crontab -l 2> /dev/null | grep -q '# {NAME}$'; then crontab -l | grep -v '# {NAME}$' | crontab -; fi; rm -f ~/.config/systemd/user/{NAME}.service ~/.config/systemd/user/default.target.wants/{NAME}.service; "#
    )
}
