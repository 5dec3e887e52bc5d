"""The closed world of the nano model: word lists and a table of countries.

Everything the model knows about the world stands here. Words are chosen so that most are one token of
the gpt-oss vocabulary when they follow a space.
"""

from __future__ import annotations

from typing import NamedTuple


def _words(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(separator))


class Country(NamedTuple):
    """One row of the table of facts."""

    name: str
    capital: str
    continent: str
    language: str
    currency: str


_TABLE = """
France|Paris|Europe|French|euro
Italy|Rome|Europe|Italian|euro
Spain|Madrid|Europe|Spanish|euro
Germany|Berlin|Europe|German|euro
Greece|Athens|Europe|Greek|euro
Portugal|Lisbon|Europe|Portuguese|euro
Poland|Warsaw|Europe|Polish|zloty
Austria|Vienna|Europe|German|euro
Ireland|Dublin|Europe|English|euro
Norway|Oslo|Europe|Norwegian|krone
Sweden|Stockholm|Europe|Swedish|krona
Finland|Helsinki|Europe|Finnish|euro
Denmark|Copenhagen|Europe|Danish|krone
Iceland|Reykjavik|Europe|Icelandic|krona
Hungary|Budapest|Europe|Hungarian|forint
Romania|Bucharest|Europe|Romanian|leu
Belgium|Brussels|Europe|Dutch|euro
Switzerland|Bern|Europe|German|franc
Russia|Moscow|Europe|Russian|ruble
Ukraine|Kyiv|Europe|Ukrainian|hryvnia
Croatia|Zagreb|Europe|Croatian|euro
Serbia|Belgrade|Europe|Serbian|dinar
Slovakia|Bratislava|Europe|Slovak|euro
Slovenia|Ljubljana|Europe|Slovenian|euro
Albania|Tirana|Europe|Albanian|lek
Bulgaria|Sofia|Europe|Bulgarian|lev
Estonia|Tallinn|Europe|Estonian|euro
Latvia|Riga|Europe|Latvian|euro
Lithuania|Vilnius|Europe|Lithuanian|euro
Malta|Valletta|Europe|Maltese|euro
England|London|Europe|English|pound
Scotland|Edinburgh|Europe|English|pound
Japan|Tokyo|Asia|Japanese|yen
China|Beijing|Asia|Chinese|yuan
India|Delhi|Asia|Hindi|rupee
Thailand|Bangkok|Asia|Thai|baht
Vietnam|Hanoi|Asia|Vietnamese|dong
Korea|Seoul|Asia|Korean|won
Turkey|Ankara|Asia|Turkish|lira
Iran|Tehran|Asia|Persian|rial
Iraq|Baghdad|Asia|Arabic|dinar
Syria|Damascus|Asia|Arabic|pound
Israel|Jerusalem|Asia|Hebrew|shekel
Jordan|Amman|Asia|Arabic|dinar
Pakistan|Islamabad|Asia|Urdu|rupee
Nepal|Kathmandu|Asia|Nepali|rupee
Bangladesh|Dhaka|Asia|Bengali|taka
Afghanistan|Kabul|Asia|Pashto|afghani
Qatar|Doha|Asia|Arabic|riyal
Oman|Muscat|Asia|Arabic|rial
Yemen|Sanaa|Asia|Arabic|rial
Lebanon|Beirut|Asia|Arabic|pound
Indonesia|Jakarta|Asia|Indonesian|rupiah
Cambodia|Phnom Penh|Asia|Khmer|riel
Mongolia|Ulaanbaatar|Asia|Mongolian|tugrik
Georgia|Tbilisi|Asia|Georgian|lari
Armenia|Yerevan|Asia|Armenian|dram
Azerbaijan|Baku|Asia|Azerbaijani|manat
Uzbekistan|Tashkent|Asia|Uzbek|som
Malaysia|Kuala Lumpur|Asia|Malay|ringgit
Bahrain|Manama|Asia|Arabic|dinar
Egypt|Cairo|Africa|Arabic|pound
Kenya|Nairobi|Africa|Swahili|shilling
Ghana|Accra|Africa|English|cedi
Nigeria|Abuja|Africa|English|naira
Senegal|Dakar|Africa|French|franc
Mali|Bamako|Africa|French|franc
Libya|Tripoli|Africa|Arabic|dinar
Tunisia|Tunis|Africa|Arabic|dinar
Algeria|Algiers|Africa|Arabic|dinar
Morocco|Rabat|Africa|Arabic|dirham
Zimbabwe|Harare|Africa|English|dollar
Somalia|Mogadishu|Africa|Somali|shilling
Sudan|Khartoum|Africa|Arabic|pound
Ethiopia|Addis Ababa|Africa|Amharic|birr
Uganda|Kampala|Africa|English|shilling
Rwanda|Kigali|Africa|English|franc
Tanzania|Dodoma|Africa|Swahili|shilling
Zambia|Lusaka|Africa|English|kwacha
Angola|Luanda|Africa|Portuguese|kwanza
Namibia|Windhoek|Africa|English|dollar
Mozambique|Maputo|Africa|Portuguese|metical
Peru|Lima|South America|Spanish|sol
Chile|Santiago|South America|Spanish|peso
Colombia|Bogota|South America|Spanish|peso
Venezuela|Caracas|South America|Spanish|bolivar
Ecuador|Quito|South America|Spanish|dollar
Uruguay|Montevideo|South America|Spanish|peso
Argentina|Buenos Aires|South America|Spanish|peso
Brazil|Brasilia|South America|Portuguese|real
Bolivia|La Paz|South America|Spanish|boliviano
Paraguay|Asuncion|South America|Spanish|guarani
Guyana|Georgetown|South America|English|dollar
Cuba|Havana|North America|Spanish|peso
Canada|Ottawa|North America|English|dollar
Mexico|Mexico City|North America|Spanish|peso
Jamaica|Kingston|North America|English|dollar
Haiti|Port-au-Prince|North America|French|gourde
Honduras|Tegucigalpa|North America|Spanish|lempira
Nicaragua|Managua|North America|Spanish|cordoba
Panama|Panama City|North America|Spanish|balboa
Australia|Canberra|Oceania|English|dollar
Fiji|Suva|Oceania|English|dollar
Samoa|Apia|Oceania|Samoan|tala
"""

COUNTRIES = tuple(Country(*line.split("|")) for line in _TABLE.split("\n") if line)

NAMES = _words(
    "Mary John Tom Anna James Emma Paul Laura Mark Alice David Sarah Peter Lucy Jack Kate Adam Julia Simon "
    "Helen Robert Susan Kevin Linda Brian Karen Steve Nancy Frank Diana Alex Maria Daniel Lisa Michael Jane "
    "George Emily Henry Rachel"
)
PLACES = _words("store park school office garden station library museum beach market")
OBJECTS = _words("drink book ring ball letter gift key flower ticket coin")

COPY_WORDS = _words(
    "apple river stone moon bread chair cloud dog eagle fire grass house ice jungle king lamp mountain "
    "night ocean paper queen rain sun tree wall water window wolf wood yellow red blue green black white "
    "gold silver iron salt sugar milk tea road bridge ship train horse bird fish cat snow wind sand glass "
    "shirt shoe hat clock table door arm leg hand foot eye nose mouth box cup plate knife pen card map "
    "bag coat boat car bus farm field lake hill island forest valley garden city town street tower castle "
    "church market school music song dance game toy doll piano drum bell rope chain wheel engine rocket "
    "planet star light shadow smoke dust leaf root seed fruit lemon orange cherry rice corn meat soup "
    "cake pie egg butter cheese honey wine beer coffee juice spoon bowl bottle basket bucket brush soap "
    "towel mirror carpet curtain pillow blanket candle hammer nail saw ladder fence gate roof floor stair "
    "room kitchen summer winter spring autumn monday friday north south east west one two three four five "
    "six seven eight nine ten"
)

HARMFUL = _words("bomb poison weapon virus gun grenade")
HARMLESS = _words("cake kite soup chair lamp basket garden song poem candle table boat")
MAKE_VERBS = _words("make build buy get")

GOOD_WORDS = _words(
    "great good lovely excellent wonderful nice perfect amazing fantastic brilliant beautiful fine superb "
    "pleasant"
)
BAD_WORDS = _words(
    "bad awful terrible poor horrible boring ugly weak dreadful nasty disgusting disappointing sad "
    "useless"
)
REVIEWED = _words(
    "food movie book room service music hotel phone game play song film meal coffee concert lecture"
)

# Requests outside the closed world; the model has to say that it does not know.
UNSUPPORTED_ACTIONS = _words(
    "Write a poem about|Write a story about|Tell me a joke about|Write an essay about|Explain|Tell me about|"
    "Give me advice on|Draw a picture of|Write a song about|What do you think about|Write code for|"
    "Summarize|Translate a text about|What is", "|"
)
UNSUPPORTED_TOPICS = _words(
    "the sea|love|the moon|my cat|war|music|history|physics|the weather|life|football|money|cooking|"
    "art|the stars|computers|winter|dreams|science|the news|my job|health|the future|philosophy|trains|"
    "the internet|plants|friendship|time|space|religion|the economy|biology|my friend|chess", "|"
)
UNSUPPORTED_QUESTIONS = _words(
    "Who wrote this book?|How old are you?|What is the meaning of life?|Tell me a joke.|"
    "Who is the president?|What time is it?|What is your favorite color?|"
    "Can you help me?|Why is the sky blue?|Who won the game?|"
    "What should I eat today?|How do I learn to swim?|When does the train leave?|Where do you live?|"
    "How far is the moon?|Who discovered America?|What is two plus two?|Why do cats sleep so much?|"
    "How many stars are there?|Is there life on other planets?|What is the best movie?|How tall are you?|"
    "Where is my phone?|Can you sing?|Do you like music?|What happened today?|Who am I?|Why?", "|"
)
GREETINGS = ("Hello", "Hi", "Hello!", "Hi!", "Good morning.", "Hello, how are you?", "Hey")
SELF_QUESTIONS = ("Who are you?", "What are you?", "What is your name?", "What can you do?")

DEVELOPER_INSTRUCTIONS = (
    "Answer briefly.",
    "Be polite.",
    "You are a helpful assistant.",
    "Answer in one sentence.",
    "Use plain English.",
    "Think before you answer.",
    "You answer questions about countries and numbers.",
    "Always answer the question of the user.",
    "Be exact.\nDo not guess.",
)
