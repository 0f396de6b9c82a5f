import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.concurrent.atomic.AtomicInteger;

/** Threads compute until told to end; then all is computed again. */
class Compute {
    static final int BLOCK = 20000;
    static Path status;
    static Path go;

    static void say(String text) throws Exception {
        Path next = Path.of(status + ".new");
        Files.writeString(next, text + "\n");
        Files.move(next, status, StandardCopyOption.ATOMIC_MOVE);
    }

    static long step(long value, long count) {
        for (long n = 0; n < count; n++) value = value * 6364136223846793005L + 1442695040888963407L;
        return value;
    }

    public static void main(String[] arguments) throws Exception {
        status = Path.of(arguments[0]);
        go = Path.of(arguments[0] + ".go");
        String error;
        try {
            error = compute();
        } catch (Throwable caught) {
            error = caught.toString();
        }
        say(error == null ? "ok" : "failed: " + error);
        System.exit(error == null ? 0 : 1);
    }

    static String compute() throws Exception {
        int count = 6;
        long[] values = new long[count];
        long[] blocks = new long[count];
        AtomicInteger started = new AtomicInteger();
        List<Thread> threads = new ArrayList<>();
        var table = new HashMap<String, List<Integer>>();
        for (int n = 0; n < 20000; n++) {
            table.computeIfAbsent("key" + n % 100, key -> new ArrayList<>()).add(n);
        }
        for (int at = 0; at < count; at++) {
            int own = at;
            Thread thread = new Thread(() -> {
                try {
                    int left = 10;
                    values[own] = own;
                    while (left > 0) {
                        values[own] = step(values[own], BLOCK);
                        if (++blocks[own] == 10) started.incrementAndGet();
                        // Garbage for the collector.
                        byte[] waste = new byte[100_000];
                        waste[own] = 1;
                        if (Files.exists(go)) left--;
                        Thread.sleep(1);
                    }
                } catch (Exception caught) {
                    values[own] = -1;
                }
            });
            thread.start();
            threads.add(thread);
        }
        while (started.get() < count) Thread.sleep(2);
        say("ready");
        for (Thread thread : threads) thread.join();
        for (int at = 0; at < count; at++) {
            if (step(at, blocks[at] * BLOCK) != values[at]) return "result of thread " + at;
        }
        for (int n = 0; n < 20000; n++) {
            if (table.get("key" + n % 100).get(n / 100) != n) return "table at " + n;
        }
        System.gc();
        return null;
    }
}
