//! Machines with addresses of their own: each has its network, processes and home, and a real ssh
//! server.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use updraft_provision::SshTarget;
use updraft_provision::providers::ssh::SshHost;

/// Set where a test runs in namespaces that are its own.
const INSIDE: &str = "UPDRAFT_TEST_LAB";

/// The network of the lab; the tests themselves are its first address.
const NET: [u8; 3] = [10, 77, 0];

/// Runs the ignored tests whose names begin with `prefix` in namespaces of their own, which end with
/// them; where that may not be, prints why and returns.
pub(crate) fn run_inside(prefix: &str) {
    if let Some(reason) = why_not() {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("skipped: {reason}");
        }
        return;
    }
    // A machine's home hides the target folder where that lies below `~`.
    let place = tempfile::tempdir().expect("a temporary folder");
    let program = place.path().join("tests");
    let own = std::env::current_exe().expect("this program");
    std::fs::copy(own, &program).expect("a copy of this program");
    let output = namespaces()
        .arg(program)
        .args(["--ignored", "--test-threads=1", prefix])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .expect("unshare");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
    assert!(
        !said.contains("running 0 tests"),
        "no test is called {prefix}: {said}"
    );
}

/// Network, mounts and processes apart from everybody else's, and gone with the first process.
fn namespaces() -> Command {
    let mut command = Command::new("unshare");
    command.args([
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    command
}

fn why_not() -> Option<String> {
    for program in ["sshd", "ip", "rsync", "unshare"] {
        let places = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        if !places
            .iter()
            .any(|place| Path::new(place).join(program).exists())
        {
            return Some(format!("there is no {program}"));
        }
    }
    let script = "ip link add lab type bridge && ip link add cable0 type veth peer name port0";
    let tried = namespaces().args(["bash", "-c", script]).output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!(
            "no namespace of one's own: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Some(format!("no namespace of one's own: {error}")),
    }
}

/// Machines that end with the test.
pub(crate) struct Lab {
    pub(crate) hosts: Vec<SshHost>,
    machines: Vec<Machine>,
    dir: tempfile::TempDir,
}

struct Machine {
    number: u8,
    boots: u32,
    running: Child,
}

impl Machine {
    /// Ends its first process, and all others with it, and takes its cable away: the system would
    /// only do so a while later.
    fn end(&mut self) {
        let _ = self.running.kill(); // it may have ended
        let _ = self.running.wait();
        let cable = format!("cable{}", self.number);
        let mut command = Command::new("ip");
        command.args(["link", "del", &cable]).stderr(Stdio::null());
        let _ = command.status(); // it may have been faster this time
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

impl Lab {
    /// So many machines; `None` outside of the namespaces that [`run_inside`] makes.
    pub(crate) fn new(count: u8) -> Option<Self> {
        std::env::var_os(INSIDE)?;
        network();
        let dir = tempfile::tempdir().expect("folder");
        for name in ["host_key", "user_key"] {
            let done = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(dir.path().join(name))
                .status();
            assert!(done.expect("ssh-keygen").success());
        }
        let public = std::fs::read_to_string(dir.path().join("host_key.pub")).expect("key");
        std::fs::create_dir_all("/run/sshd").expect("privilege separation folder");
        let mut lab = Self {
            hosts: Vec::new(),
            machines: Vec::new(),
            dir,
        };
        let mut known = String::new();
        for number in 0..count {
            let address = address(number).to_string();
            known.push_str(&format!("{address} {public}"));
            std::fs::create_dir(lab.home(number)).expect("home");
            let running = lab.boot(number, 0);
            lab.machines.push(Machine {
                number,
                boots: 0,
                running,
            });
            lab.hosts.push(SshHost {
                pool: "lab".into(),
                target: SshTarget {
                    host: address,
                    port: None,
                    user: Some("root".into()),
                    identity_file: Some(lab.dir.path().join("user_key")),
                    known_hosts: Some(lab.dir.path().join("known_hosts")),
                },
                accelerator: None,
            });
        }
        std::fs::write(lab.dir.path().join("known_hosts"), known).expect("known hosts");
        Some(lab)
    }

    /// The home on a machine.
    pub(crate) fn home(&self, number: u8) -> PathBuf {
        self.dir.path().join(format!("home{number}"))
    }

    /// Switches a machine off, with everything that runs on it.
    pub(crate) fn switch_off(&mut self, number: u8) {
        self.machine(number).end();
    }

    /// Switches it off and on: its disk stays, its boot id does not.
    pub(crate) fn reboot(&mut self, number: u8) {
        self.switch_off(number);
        let boots = self.machine(number).boots + 1;
        let running = self.boot(number, boots);
        let machine = self.machine(number);
        (machine.boots, machine.running) = (boots, running);
    }

    /// Somebody at a terminal of the machine, until the child ends.
    pub(crate) fn log_in(&self, number: u8) -> Child {
        let dir = self.dir.path();
        Command::new("ssh")
            .args(["-tt", "-o", "StrictHostKeyChecking=yes", "-o"])
            .arg(format!(
                "UserKnownHostsFile={}",
                dir.join("known_hosts").display()
            ))
            .arg("-i")
            .arg(dir.join("user_key"))
            .arg(format!("root@{}", address(number)))
            .arg("echo welcome; exec sleep 600")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("ssh")
    }

    fn machine(&mut self, number: u8) -> &mut Machine {
        let found = self
            .machines
            .iter_mut()
            .find(|machine| machine.number == number);
        found.expect("a machine of that number")
    }

    fn boot(&self, number: u8, boots: u32) -> Child {
        let dir = self.dir.path();
        let boot_id = dir.join(format!("boot{number}"));
        std::fs::write(&boot_id, format!("boot-{number}-{boots}\n")).expect("boot id");
        let options: String = [
            "UsePAM=no".to_owned(),
            "StrictModes=no".to_owned(),
            "PidFile=none".to_owned(),
            "PasswordAuthentication=no".to_owned(),
            "MaxStartups=100".to_owned(),
            "MaxSessions=100".to_owned(),
            format!("HostKey={}", dir.join("host_key").display()),
            format!("AuthorizedKeysFile={}", dir.join("user_key.pub").display()),
        ]
        .iter()
        .map(|option| format!(" -o {option}"))
        .collect();
        // Waits for its cable, then comes up as a machine with this home and boot id.
        let script = format!(
            "set -e; until ip link show port{number} >/dev/null 2>&1; do sleep 0.01; done\n\
             ip link set lo up; ip addr add {}/24 dev port{number}; ip link set port{number} up\n\
             mount --bind {} ~; mount --bind {} /proc/sys/kernel/random/boot_id\n\
             exec /usr/sbin/sshd -D -e -f /dev/null{options}",
            address(number),
            self.home(number).display(),
            boot_id.display(),
        );
        let running = namespaces()
            .args(["bash", "-c", &script])
            .env("HOME", "/root")
            .env_remove(INSIDE)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("unshare");
        let pid = running.id();
        // The cable may be laid only once the machine has a network of its own.
        let network = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        until("a network of its own", || {
            network(&pid.to_string()) != network("self")
        });
        // The same card after a reboot: neighbours remember it.
        ip(&format!(
            "link add cable{number} type veth peer name port{number} address 02:77:00:00:00:{number:02x}"
        ));
        ip(&format!("link set cable{number} master lab up"));
        ip(&format!("link set port{number} netns {pid}"));
        let address = (address(number), 22).into();
        let soon = Duration::from_secs(1);
        until("an ssh server", || {
            std::net::TcpStream::connect_timeout(&address, soon).is_ok()
        });
        running
    }
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(NET[0], NET[1], NET[2], 10 + number)
}

/// The switch that all machines are plugged into, once per process.
fn network() {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| {
        ip("link set lo up");
        ip("link add lab type bridge");
        let [a, b, c] = NET;
        ip(&format!("addr add {a}.{b}.{c}.1/24 dev lab"));
        ip("link set lab up");
    });
}

fn ip(words: &str) {
    let output = Command::new("ip")
        .args(words.split(' '))
        .output()
        .expect("ip");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {words}: {said}");
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} is not there in a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}
