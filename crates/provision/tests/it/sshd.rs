//! Real ssh servers on loopback, each a "machine" with a home of its own.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use updraft_provision::SshTarget;
use updraft_provision::providers::ssh::SshHost;

const SSHD: &str = "/usr/sbin/sshd";

/// Machines that end with the test.
pub(crate) struct Machines {
    pub(crate) hosts: Vec<SshHost>,
    servers: Vec<Child>,
    dir: tempfile::TempDir,
}

impl Machines {
    /// The home on a machine.
    pub(crate) fn home(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("home{number}"))
    }

    /// Switches a machine off.
    pub(crate) fn stop(&mut self, number: usize) {
        let _ = self.servers[number].kill(); // it may have ended
        let _ = self.servers[number].wait();
    }

    /// Ends the connections of a machine, which goes on listening.
    pub(crate) fn cut(&mut self, number: usize) {
        let parent = self.servers[number].id().to_string();
        let done = Command::new("pkill")
            .args(["-KILL", "-P", &parent])
            .status();
        assert!(done.expect("pkill").success(), "there was no connection");
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill(); // it may have ended
            let _ = server.wait();
        }
    }
}

/// Starts so many machines; `None`, with the reason printed, where there is no ssh server.
pub(crate) fn machines(count: usize) -> Option<Machines> {
    let reason = match (Path::new(SSHD).exists(), is_root()) {
        (false, _) => "there is no /usr/sbin/sshd (apt-get install openssh-server)",
        (_, false) => "an ssh server of one's own needs root",
        _ => return Some(start(count)),
    };
    #[expect(clippy::print_stderr, reason = "a skipped test says so")]
    {
        eprintln!("skipped: {reason}");
    }
    None
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|id| id.stdout == b"0\n")
}

fn start(count: usize) -> Machines {
    let dir = tempfile::tempdir().expect("folder");
    let root = dir.path();
    for name in ["host_key", "user_key"] {
        let done = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(root.join(name))
            .status();
        assert!(done.expect("ssh-keygen").success());
    }
    let public = std::fs::read_to_string(root.join("host_key.pub")).expect("key");
    std::fs::copy(root.join("user_key.pub"), root.join("authorized")).expect("copy");
    std::fs::create_dir_all("/run/sshd").expect("privilege separation folder");
    let mut known = String::new();
    let (mut hosts, mut servers) = (Vec::new(), Vec::new());
    for number in 0..count {
        let home = root.join(format!("home{number}"));
        std::fs::create_dir_all(home.join("instance")).expect("home");
        // Each machine has its own home: the login runs in it.
        let login = root.join(format!("login{number}"));
        let script = format!(
            "#!/bin/bash\nexport HOME={home} PATH={home}/bin:$PATH\ncd {home}\nexec bash -c \"$SSH_ORIGINAL_COMMAND\"\n",
            home = home.display()
        );
        std::fs::write(&login, script).expect("login");
        std::fs::set_permissions(&login, PermissionsExt::from_mode(0o755)).expect("mode");
        let port = free_port();
        servers.push(serve(root, port, &login));
        known.push_str(&format!("[127.0.0.1]:{port} {public}"));
        hosts.push(SshHost {
            pool: "lab".into(),
            target: SshTarget {
                host: "127.0.0.1".into(),
                port: Some(port),
                user: Some("root".into()),
                identity_file: Some(root.join("user_key")),
                known_hosts: Some(root.join("known_hosts")),
            },
            accelerator: None,
        });
    }
    std::fs::write(root.join("known_hosts"), known).expect("known hosts");
    Machines {
        hosts,
        servers,
        dir,
    }
}

fn serve(root: &Path, port: u16, login: &Path) -> Child {
    let key: PathBuf = root.join("host_key");
    let server = Command::new(SSHD)
        .args(["-D", "-e", "-f", "/dev/null"])
        .args([
            "-o",
            "UsePAM=no",
            "-o",
            "StrictModes=no",
            "-o",
            "PidFile=none",
        ])
        .args([
            "-o",
            "PasswordAuthentication=no",
            "-o",
            "ListenAddress=127.0.0.1",
        ])
        .args(["-o", "MaxStartups=100", "-o", "MaxSessions=100"])
        .args(["-o", &format!("Port={port}")])
        .args(["-o", &format!("HostKey={}", key.display())])
        .args([
            "-o",
            &format!("AuthorizedKeysFile={}", root.join("authorized").display()),
        ])
        .args(["-o", &format!("ForceCommand={}", login.display())])
        .stderr(Stdio::null())
        .spawn()
        .expect("sshd");
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "sshd does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    server
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}
