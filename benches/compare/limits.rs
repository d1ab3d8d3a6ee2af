//! What the machine itself can do: the same bytes over loopback, to the disk, out of the page cache, with nothing of
//! ZEO around them. One file without dependencies, built by `limits.py` with `rustc -O`; each command prints JSON.
//!
//! Costs: a round trip is one `write` and one `read` on each side, blocking sockets, TCP_NODELAY, two processes.

use std::fs::{File, OpenOptions};
use std::io::{Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize| args.get(i).and_then(|a| a.parse::<usize>().ok()).unwrap_or(0);
    match args.first().map(String::as_str) {
        Some("echo") => echo(number(1), number(2)),
        Some("roundtrip") => roundtrip(number(1), number(2), number(3), number(4)),
        Some("stream") => stream(number(1)),
        Some("sink") => sink(number(1)),
        Some("sync") => sync(&args[1], number(2), number(3)),
        Some("pread") => pread(&args[1], number(2), number(3)),
        Some("memcpy") => memcpy(number(1), number(2)),
        _ => Err(std::io::Error::other("limits: roundtrip REQUEST REPLY COUNT CONNECTIONS | stream BYTES | sync FILE BYTES COUNT | pread FILE BYTES COUNT | memcpy BYTES COUNT")),
    }
}

/// Starts this program again as the peer; returns it with the port it listens on.
fn peer(args: &[String]) -> Result<(Child, u16)> {
    let mut child = Command::new(std::env::current_exe()?).args(args).stdout(Stdio::piped()).stdin(Stdio::piped()).spawn()?;
    let mut line = Vec::new();
    let mut byte = [0];
    let mut out = child.stdout.take().ok_or_else(|| std::io::Error::other("no stdout"))?;
    while out.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    let port = String::from_utf8_lossy(&line).parse().map_err(std::io::Error::other)?;
    Ok((child, port))
}

fn listen() -> Result<TcpListener> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    println!("{}", listener.local_addr()?.port());
    Ok(listener)
}

/// Peer of `roundtrip`: a thread a connection, `reply` bytes for each `request` bytes; ends when its stdin does.
fn echo(request: usize, reply: usize) -> Result<()> {
    let listener = listen()?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(stream, request, reply));
        }
    });
    std::io::stdin().read_to_end(&mut Vec::new()).map(drop)
}

fn serve(mut stream: TcpStream, request: usize, reply: usize) -> Result<()> {
    stream.set_nodelay(true)?;
    let (mut input, output) = (vec![0; request], vec![1; reply]);
    loop {
        stream.read_exact(&mut input)?;
        stream.write_all(&output)?;
    }
}

fn roundtrip(request: usize, reply: usize, count: usize, connections: usize) -> Result<()> {
    let (mut child, port) = peer(&["echo".into(), request.to_string(), reply.to_string()])?;
    let barrier = Arc::new(Barrier::new(connections + 1));
    let threads: Vec<_> = (0..connections)
        .map(|_| {
            let barrier = Arc::clone(&barrier);
            thread::spawn(move || -> Result<()> {
                let mut stream = TcpStream::connect(("127.0.0.1", port))?;
                stream.set_nodelay(true)?;
                let (output, mut input) = (vec![2; request], vec![0; reply]);
                for step in 0..count + 100 {
                    if step == 100 {
                        barrier.wait();
                    }
                    stream.write_all(&output)?;
                    stream.read_exact(&mut input)?;
                }
                Ok(())
            })
        })
        .collect();
    barrier.wait();
    let start = Instant::now();
    for thread in threads {
        thread.join().map_err(|_| std::io::Error::other("thread"))??;
    }
    let elapsed = start.elapsed().as_secs_f64();
    let cpu = cpu_of(child.id())?;
    drop(child.stdin.take());
    child.wait()?;
    let total = (count * connections) as f64;
    println!(
        "{{\"seconds\": {}, \"per_second\": {}, \"peer_cpu\": {}}}",
        elapsed / count as f64,
        total / elapsed,
        cpu / (total + (100 * connections) as f64)
    );
    Ok(())
}

/// CPU seconds of a process with its ended threads, to a hundredth (the ticks of /proc/PID/stat).
fn cpu_of(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    Ok(fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0)
}

/// Peer of `stream`: reads `bytes`, then answers one byte.
fn sink(bytes: usize) -> Result<()> {
    let (mut stream, _) = listen()?.accept()?;
    let mut buffer = vec![0; 256 * 1024];
    let mut left = bytes;
    while left > 0 {
        match stream.read(&mut buffer)? {
            0 => break,
            n => left -= n.min(left),
        }
    }
    stream.write_all(b".")
}

fn stream(bytes: usize) -> Result<()> {
    let (mut child, port) = peer(&["sink".into(), bytes.to_string()])?;
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    let buffer = vec![3; 256 * 1024];
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        left -= stream.write(&buffer[..left.min(buffer.len())])?;
    }
    stream.read_exact(&mut [0])?;
    let elapsed = start.elapsed().as_secs_f64();
    child.wait()?;
    println!("{{\"seconds\": {elapsed}}}");
    Ok(())
}

/// Appends and syncs, as a commit has to; the median of `count`.
fn sync(path: &str, bytes: usize, count: usize) -> Result<()> {
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    let data = vec![4; bytes];
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        file.write_all(&data)?;
        file.sync_data()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    println!("{{\"seconds\": {}, \"low\": {}, \"high\": {}}}", times[count / 2], times[count / 20], times[count - 1 - count / 20]);
    Ok(())
}

/// Reads of `bytes` at scattered places of a file that is in the page cache.
fn pread(path: &str, bytes: usize, count: usize) -> Result<()> {
    let file = File::open(path)?;
    let blocks = (file.metadata()?.len() as usize / bytes).max(1);
    let mut buffer = vec![0; bytes];
    let mut place = 12345_usize;
    let mut run = || -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            file.read_at(&mut buffer, ((place >> 20) % blocks * bytes) as u64)?;
        }
        Ok(start.elapsed().as_secs_f64() / count as f64)
    };
    run()?;
    println!("{{\"seconds\": {}}}", run()?);
    Ok(())
}

fn memcpy(bytes: usize, count: usize) -> Result<()> {
    let (from, mut to) = (vec![5_u8; bytes], vec![0_u8; bytes]);
    let start = Instant::now();
    for _ in 0..count {
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
    }
    println!("{{\"seconds\": {}}}", start.elapsed().as_secs_f64() / count as f64);
    Ok(())
}
